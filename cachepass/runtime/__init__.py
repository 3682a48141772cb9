"""What happens during a call: sessions, frames, policies."""
