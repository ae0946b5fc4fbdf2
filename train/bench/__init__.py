"""`kdcache bench`: what a teacher costs here."""
