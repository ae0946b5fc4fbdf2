"""`kdcache views`: what a policy makes of some samples, to look at before anything is built."""
