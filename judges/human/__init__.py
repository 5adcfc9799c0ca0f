"""People as the judge: pairs wait in an SQLite file, a local page shows them, answers come back."""
