"""Images that lie in something other than files of their own, such as tars or a user's own Dataset."""
