package decisionlog

// A ConfigError is an error about one field of the server's configuration.
type ConfigError struct {
	// Field is the name of the field. The name of a field of [Signing] begins with
	// "Signing.".
	Field string
	// Err says what is wrong with its value.
	Err error
}

// Error returns the text of Err, without the name of the field.
func (e *ConfigError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *ConfigError) Unwrap() error { return e.Err }
