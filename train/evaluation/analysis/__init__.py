"""What a student's answers tell beside a few figures, and the table of them."""
