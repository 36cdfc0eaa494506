"""How models are laid out; nothing here knows how a checkpoint was made."""
