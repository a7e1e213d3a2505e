package store

// Kept is the size of what a writer keeps between writes.
func (w *LogWriter) Kept() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return cap(w.buf)
}
