"""A page on this machine to try models on images, videos and the camera; see tools/app.py."""
