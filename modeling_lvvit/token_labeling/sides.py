"""Options that are one side or height and width."""


def height_width(sides: list[int] | None, name: str, kind: str = "side or height and width") -> tuple[int, int] | None:
    """Height and width in pixels of an option, `None` where it was not given.

    Args:
        sides: One number for both, or two.
        name: What messages call the option.
        kind: What messages say it is one of.

    Raises:
        ValueError: If there are other numbers.
    """
    if sides is None:
        return None
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"{name} is one {kind}, got {sides}.")
    return sides[0], sides[-1]
