"""What verification examines, one module a check, and :mod:`edgetune.checks.judge`, which says what passes."""
