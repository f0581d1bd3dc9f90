"""What tests of properties use: how many examples are drawn, and what a refusal is."""

from hypothesis import HealthCheck, settings

from mosaic_jax.types import UserError

DRAWN = settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)


def answer(function, *arguments, **options):
    """What it returns and "", or nothing and the one line of its refusal."""
    try:
        return function(*arguments, **options), ""
    except UserError as error:
        refusal = str(error)
    assert refusal
    assert "\n" not in refusal
    return None, refusal
