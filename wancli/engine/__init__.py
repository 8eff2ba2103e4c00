"""Render a Plan: preflight, encode, denoise, decode, record, resume."""
