"""`kdcache plan`: what a cache will cost and hold, before anything is built."""
