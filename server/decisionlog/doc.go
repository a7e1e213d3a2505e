// Package decisionlog writes the decision log and proves that it is whole. It has four parts,
// each with an entry point in the file to read first:
//
//   - recorder.go: a [Recorder] commits decisions and events in batches. decision.go and
//     event.go make the records, columns.go the rows.
//   - signer.go: a [Signer] keeps the Merkle tree of the batches and signs its root.
//     signing.go watches how much of the log is signed.
//   - verify.go: [VerifyLog] recomputes the log and compares it with what is stored and what
//     was signed. verifytree.go, verifyrows.go and verifydrops.go are its steps, and
//     verifyhistory.go compares the stored entities, bundles and keys with the log.
//   - truncate.go: [TruncateLog] states, with a signature, which batches were lost.
//
// Package auditlog has the format of what is hashed and signed.
package decisionlog
