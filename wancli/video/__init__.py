"""Frames to a verified MP4 and back; metrics and pictures of videos."""
