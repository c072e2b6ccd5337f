"""Tools that examine runs, data and models; the engine never imports them."""
