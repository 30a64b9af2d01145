"""Scripts behind every measured claim: `python -m benchmarks.NAME` from the root of a clone; results/ keeps them."""
