"""File formats of data sets: one module per format, all returning `base.Splits`."""
