"""hafrm: train, evaluate, use and serve reward models that keep their language-model head."""
