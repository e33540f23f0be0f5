"""A recipe from start to end: checked, trained, measured and reported in one folder."""
