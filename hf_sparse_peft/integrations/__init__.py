"""Other people's training programs, by the interfaces that they have for it. Nothing here imports them."""
