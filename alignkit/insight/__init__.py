"""What looks at runs, data and models: it reads what they leave, and the engine never imports it."""
