"""Plan a run before it starts: here, and on TPU slices and GPUs that need not be there."""

from mosaic_jax.plan.run_plan import measured, plan

__all__ = ["measured", "plan"]
