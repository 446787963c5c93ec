"""The page: it makes run folders, starts processes on them and reads what they write. It never imports the loop, or torch."""
