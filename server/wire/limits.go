package wire

import "fmt"

// How many bytes one message to a plane may have. A larger message is refused with
// invalid_argument before it is decoded. A message of a stream counts by itself.
const (
	// MaxAuthorizeBytes is for a call of Authorize.
	MaxAuthorizeBytes = 64 << 10
	// MaxBatchBytes is for a call of AuthorizeBatch.
	MaxBatchBytes = 1 << 20
	// MaxReportBytes is for a call of ReportReuse.
	MaxReportBytes = 512 << 10
	// MaxSmallBytes is for Watch, GetRevision and the calls of health.
	MaxSmallBytes = 16 << 10
	// MaxAdminBytes is for every other call on the admin plane. Other calls on the decision
	// plane have MaxAuthorizeBytes.
	MaxAdminBytes = 4 << 20
)

// TooLarge returns the text of the error about a message that is too large. what is "question",
// "batch" or "message". size and limit are in bytes; a size of "" is not known.
func TooLarge(what, size, limit string) string {
	if size == "" {
		return fmt.Sprintf("the %s has more than %s bytes, the limit", what, limit)
	}
	return fmt.Sprintf("the %s has %s bytes, the limit is %s", what, size, limit)
}
