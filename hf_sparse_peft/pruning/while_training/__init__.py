"""Units of the base that are chosen while an adapter trains: LoRAPrune, Light-PEFT, transfer pruning."""
