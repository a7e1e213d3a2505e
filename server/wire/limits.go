package wire

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
