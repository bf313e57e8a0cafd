"""Floor 0: what knows neither torch models nor peft: options and their types, files written whole."""
