package entityfile

// Compare sets how many names a reader remembers.
func Compare(r *Reader, most int) { r.most = most }

// Compared is how many names it remembers.
func Compared(r *Reader) int { return len(r.seen) }
