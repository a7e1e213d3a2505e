package entityfile

// Compare sets the number of names that a reader stores.
func Compare(r *Reader, most int) { r.most = most }

// Compared is the number of names that it stores.
func Compared(r *Reader) int { return len(r.seen) }
