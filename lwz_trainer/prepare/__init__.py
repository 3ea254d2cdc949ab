"""From logged conversations to writing requests with word ranges, as training reads them."""
