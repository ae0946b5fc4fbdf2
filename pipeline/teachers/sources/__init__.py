"""Where teachers come from, one file for each source; the table that names them is in pipeline/teachers/teacher.py."""
