"""Files of examples and pairs, in the formats that other tools write, and what makes them unfit to train on."""
