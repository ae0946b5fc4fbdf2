"""Students as files that run without kdcache."""
