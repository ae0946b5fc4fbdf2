"""How caches are shared: a team's folder, bucket or web server."""
