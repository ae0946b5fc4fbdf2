"""Stage 1: data, views, teachers and the build of a cache."""
