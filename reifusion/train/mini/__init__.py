"""The built-in mini's own material: emoji drawings, and the captioned scenes that are composed from them."""
