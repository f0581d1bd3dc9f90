"""Plan a run before it starts: on this machine, and on TPU slices that need not be there."""

from mosaic_jax.plan.run_plan import measured, plan

__all__ = ["measured", "plan"]
