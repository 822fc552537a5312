"""What becomes of workflow files in the style of 2024, part by part. :mod:`edgetune.migrate` puts them together."""
