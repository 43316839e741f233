"""Implementations of `lip_jax.lip_pool`; nothing else imports them."""
