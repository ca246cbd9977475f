"""What every table of a profile is made of: fields with a description, a unit and a range."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def quantity(description: str, *, unit: str = "", **bounds: Any) -> Any:
    """A field's description, unit and range (`ge`, `gt`, `le`, `lt` as in pydantic)."""
    return Field(description=description, json_schema_extra={"unit": unit} if unit else None, **bounds)


class Section(BaseModel):
    """A table of a profile: frozen, and closed to names that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python takes true for 1, so `steps = true` would be a run of one step.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("should not be true or false")
        return value
