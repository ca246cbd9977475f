"""The two looks of the app. Green, yellow and red are kept for states; series are blue, violet, teal and grey."""

from __future__ import annotations

from textual.theme import Theme

FAINT = "$foreground 55%"
"""The colour of what is said beside."""

DARK = Theme(
    name="retention-dark",
    dark=True,
    background="#12151b",
    surface="#181c24",
    panel="#232935",
    boost="#232935",
    foreground="#d7dce5",
    primary="#7cacf0",
    secondary="#5fb8b0",
    accent="#c79bf2",
    success="#7fc98b",
    warning="#e5c15d",
    error="#ee7479",
    variables={
        "block-cursor-background": "#2b3950",
        "block-cursor-foreground": "#e8edf6",
        "block-cursor-text-style": "none",
        "block-cursor-blurred-background": "#232b39",
        "block-cursor-blurred-foreground": "#d7dce5",
        "footer-background": "#12151b",
        "footer-key-foreground": "#7cacf0",
        "footer-description-foreground": "#98a1b2",
        "border": "#7cacf0",
        "border-blurred": "#2b3342",
        "scrollbar": "#2b3342",
        "scrollbar-background": "#12151b",
        "scrollbar-corner-color": "#12151b",
        "input-selection-background": "#7cacf0 30%",
        "button-focus-text-style": "bold",
    },
)

LIGHT = Theme(
    name="retention-light",
    dark=False,
    background="#f7f7f4",
    surface="#efefea",
    panel="#e2e2dc",
    boost="#e2e2dc",
    foreground="#24282f",
    primary="#2a63b8",
    secondary="#17766f",
    accent="#8a3fc0",
    success="#2b7d3b",
    warning="#946600",
    error="#bb2a33",
    variables={
        "block-cursor-background": "#d3deef",
        "block-cursor-foreground": "#14181f",
        "block-cursor-text-style": "none",
        "block-cursor-blurred-background": "#e2e6ec",
        "block-cursor-blurred-foreground": "#24282f",
        "footer-background": "#f7f7f4",
        "footer-key-foreground": "#2a63b8",
        "footer-description-foreground": "#5c636f",
        "border": "#2a63b8",
        "border-blurred": "#cfcfc7",
        "scrollbar": "#cfcfc7",
        "scrollbar-background": "#f7f7f4",
        "scrollbar-corner-color": "#f7f7f4",
        "input-selection-background": "#2a63b8 25%",
        "button-focus-text-style": "bold",
    },
)
