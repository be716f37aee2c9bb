"""The theory on one's own model and data: `analysis` fed from models, with tables, charts and JSON as the outcome."""
