package auditlog

// The kinds of a [Finding].
const (
	KindAltered   = "altered"   // a record does not have the hash that it should
	KindMissing   = "missing"   // records before this one are not there
	KindMisplaced = "misplaced" // a record is out of place: inserted, repeated or moved
	KindForeign   = "foreign"   // a line that is no record
	KindDamaged   = "damaged"   // more than one line was damaged before the log went on
	KindTorn      = "torn"      // the last line is cut short, and no record says why
	KindEmpty     = "empty"     // a file without a record
	KindKey       = "key"       // a record of another key, or of none
	KindEnd       = "end"       // the expected hash is missing: the end was removed or rewritten
)

// Finding is something that is wrong with a log.
type Finding struct {
	File string `json:"file,omitempty"`
	Line int    `json:"line,omitempty"` // from 1
	Seq  uint64 `json:"seq,omitempty"`  // of the record, where there is one
	Kind string `json:"kind"`
	Text string `json:"text"`
}

// FileReport is what a file holds.
type FileReport struct {
	File     string `json:"file"`
	Records  int    `json:"records"`
	FirstSeq uint64 `json:"firstSeq"`
	LastSeq  uint64 `json:"lastSeq"`
	LastHash string `json:"lastHash"`
}

// Report is what Verify found.
type Report struct {
	OK       bool         `json:"ok"`
	Keyed    bool         `json:"keyed"`
	Records  int          `json:"records"`
	FirstSeq uint64       `json:"firstSeq"`
	LastSeq  uint64       `json:"lastSeq"`
	LastHash string       `json:"lastHash"` // to keep elsewhere
	Lost     uint64       `json:"lost"`     // records that the log says could not be written
	Since    *int         `json:"recordsSinceExpected,omitempty"`
	Files    []FileReport `json:"files"`
	Findings []Finding    `json:"findings"` // the first thousand
	More     int          `json:"moreFindings,omitempty"`
	Notes    []Finding    `json:"notes"` // what is not wrong but worth knowing
}

const maxFindings = 1000
