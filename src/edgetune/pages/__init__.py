"""How the report and the model card are written: charts, number formats, and the templates."""
