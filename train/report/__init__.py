"""`kdcache report`: one page of HTML about caches and runs, to look at."""
