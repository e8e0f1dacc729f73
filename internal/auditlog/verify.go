package auditlog

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
)

// VerifyOptions say what is expected of a log.
type VerifyOptions struct {
	Key []byte // of the chain; nil: it has none
	// ExpectLast is a hash, in hexadecimal, that a record of the log must have; "" for none.
	// Records may follow it.
	ExpectLast string
}

// The errors of Verify that its caller can correct.
var (
	ErrKeyed    = errors.New("the chain is keyed, and can be checked with its key only")
	ErrExpected = errors.New("the expected hash is not 64 hexadecimal digits in lower case")
	ErrSeveral  = errors.New("each of them begins with record 1: they are not files of one log")
)

// Input is a file of a log.
type Input struct {
	Name string
	io.Reader
}

// Verify checks the files of one log, oldest first. An error means that it could not: [ErrKeyed],
// [ErrExpected], a bad key, or a file that cannot be read. What is wrong with the log is in the
// report.
func Verify(o VerifyOptions, files ...Input) (*Report, error) {
	c, err := newChain(o.Key)
	if err != nil {
		return nil, err
	}
	v := &verifier{chain: c, report: &Report{Keyed: o.Key != nil, Files: []FileReport{}, Findings: []Finding{}, Notes: []Finding{}}}
	if o.ExpectLast != "" {
		s, ok := parseSum(o.ExpectLast)
		if !ok {
			return nil, ErrExpected
		}
		v.expected = &s
	}
	for _, f := range files {
		if err := v.file(f); err != nil {
			return nil, err
		}
	}
	r := v.report
	r.LastSeq, r.LastHash, r.Since = v.last, v.previous.String(), v.since
	if v.expected != nil && v.since == nil {
		v.find(KindEnd, "no record has the expected hash: records up to it were removed from the end, or rewritten")
	}
	r.OK = len(r.Findings) == 0
	return r, nil
}

// VerifyFiles is Verify for files by name, in any order: it puts them in the order of their first
// records. It returns [ErrSeveral] if two of them are the beginning of a log.
func VerifyFiles(o VerifyOptions, names ...string) (*Report, error) {
	type opened struct {
		name string
		f    *os.File
		seq  uint64
	}
	var all []opened
	defer func() {
		for _, o := range all {
			_ = o.f.Close() // it was only read
		}
	}()
	for _, name := range names {
		f, err := os.Open(name) //nolint:gosec // the operator names the file
		if err != nil {
			return nil, fmt.Errorf("verify audit log: %w", err)
		}
		all = append(all, opened{name: name, f: f})
		if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
			return nil, fmt.Errorf("verify audit log: %s is not a regular file", name)
		}
		if all[len(all)-1].seq, err = firstSeq(f); err != nil {
			return nil, fmt.Errorf("verify audit log: %w", err)
		}
	}
	slices.SortStableFunc(all, func(a, b opened) int { return cmp.Compare(a.seq, b.seq) })
	if len(all) > 1 && all[0].seq == 1 && all[1].seq == 1 {
		return nil, fmt.Errorf("%s and %s: %w", printable.Name(all[0].name), printable.Name(all[1].name), ErrSeveral)
	}
	inputs := make([]Input, len(all))
	for i, o := range all {
		inputs[i] = Input{Name: o.name, Reader: o.f}
	}
	return Verify(o, inputs...)
}

// firstSeq is the number of the first record of f, or of what may be one. A file without any sorts
// last.
func firstSeq(f *os.File) (uint64, error) {
	lines := newLines(f)
	for {
		l, err := lines.next()
		if errors.Is(err, io.EOF) {
			_, err = f.Seek(0, io.SeekStart)
			return ^uint64(0), err
		}
		if err != nil {
			return 0, err
		}
		if w, err := parse(l.text); err == nil {
			_, err = f.Seek(0, io.SeekStart)
			return w.Seq, err
		}
	}
}

// verifier walks over the files.
type verifier struct {
	chain    chain
	report   *Report
	expected *sum
	since    *int // records since the expected one

	name string // of the file
	line int
	seq  uint64 // of the current record; 0 for a line that is not a record

	started  bool // there was a record
	last     uint64
	previous sum
}

func (v *verifier) find(kind, format string, args ...any) {
	if len(v.report.Findings) >= maxFindings {
		v.report.More++
		return
	}
	v.report.Findings = append(v.report.Findings, v.finding(kind, format, args...))
}

func (v *verifier) note(kind, format string, args ...any) {
	if len(v.report.Notes) < maxFindings {
		v.report.Notes = append(v.report.Notes, v.finding(kind, format, args...))
	}
}

func (v *verifier) finding(kind, format string, args ...any) Finding {
	return Finding{File: v.name, Line: v.line, Seq: v.seq, Kind: kind, Text: printable.Sprintf(format, args...)}
}

// file checks one file, after those before it.
func (v *verifier) file(in Input) error {
	v.name, v.line, v.seq = in.Name, 0, 0
	fr := FileReport{File: in.Name}
	lines, whole := newLines(in.Reader), true // whether the piece before ended its line
	// lines that are no records, since the last one that is
	var invalid *invalidLines
	for {
		l, err := lines.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("verify audit log: read %s: %w", in.Name, err)
		}
		if whole {
			v.line++
		}
		whole = l.ended
		w, err := parse(l.text)
		if err != nil || !l.ended || l.cut {
			if invalid == nil {
				invalid = newInvalidLines(v.line)
			}
			invalid.add(l)
			continue
		}
		v.seq = w.Seq
		if v.chain.key == nil && !v.started && w.ChainKey != "" {
			return fmt.Errorf("verify audit log: %s: %w (key %s)", in.Name, ErrKeyed, printable.Text(clip(w.ChainKey, 64)))
		}
		v.invalid(invalid, &w)
		invalid = nil
		v.record(&w, fr.Records == 0)
		if fr.Records++; fr.Records == 1 {
			fr.FirstSeq = w.Seq
		}
		fr.LastSeq, fr.LastHash = v.last, v.previous.String()
	}
	v.seq = 0
	v.invalid(invalid, nil)
	if fr.Records == 0 && invalid == nil {
		v.find(KindEmpty, "the file holds no record")
	}
	v.report.Files = append(v.report.Files, fr)
	return nil
}

// invalid judges lines that are no records. next is the record after them; nil at the end of a
// file.
func (v *verifier) invalid(o *invalidLines, next *parsedRecord) {
	if o == nil {
		return
	}
	line, seq := v.line, v.seq
	defer func() { v.line, v.seq = line, seq }()
	v.line, v.seq = o.first, 0
	switch {
	case next == nil && o.lines == 1 && !o.ended:
		v.find(KindTorn, "the last line is truncated, by a crash or a user; no record reports it yet")
	case next == nil || next.Event != eventTorn || !o.is(next.TornBytes, next.TornHash):
		v.find(KindForeign, "from here on, %s of an audit log, or not any more", printable.Count(o.lines, "line is no record", "lines are no records"))
	case o.lines == 1 && o.bytes == next.TornBytes+1:
		v.note(KindTorn, "torn: a crash cut this line short, as record %d says", next.Seq)
	default:
		v.find(KindDamaged, "from here on, %s damaged before record %d was written, as it says", printable.Count(o.lines, "line was", "lines were"), next.Seq)
	}
}

// record checks a record against the ones before it.
func (v *verifier) record(w *parsedRecord, first bool) {
	r := v.report
	r.Records++
	if r.FirstSeq == 0 {
		r.FirstSeq = w.Seq
	}
	switch w.ChainKey {
	case v.chain.id:
	case "":
		v.find(KindKey, "record %d is not keyed, though a key was given", w.Seq)
	default:
		v.find(KindKey, "record %d is keyed with another key (%s) than the one given (%s)", w.Seq, clip(w.ChainKey, 64), keyName(v.chain.id))
	}
	if v.started && w.Seq <= v.last {
		v.find(KindMisplaced, "record %d follows record %d: it was inserted, repeated or moved", w.Seq, v.last)
		v.match(w)
		return // what follows is judged by the records before it
	}
	base := v.previous
	if first {
		base = v.begin(w)
	} else if w.Seq != v.last+1 {
		v.find(KindMissing, "%s missing before this one", span(v.last+1, w.Seq-1))
		base = w.hash // the hash before it is gone, so its own cannot be checked
	}
	if base != w.hash && v.chain.next(base, w.body) != w.hash {
		v.find(KindAltered, "record %d does not have the hash that it should: it was altered, or the record before it was altered or replaced", w.Seq)
	}
	if w.Event == eventLost {
		r.Lost += w.Lost
		v.note(string(eventLost), "%s could not be written since %s", printable.Count(w.Lost, "record", "records"), clip(w.Since, 64))
	}
	v.started, v.last, v.previous = true, w.Seq, w.hash
	v.match(w)
}

// begin judges where a file begins, and returns the hash before its first record.
func (v *verifier) begin(w *parsedRecord) sum {
	named, ok := parseSum(w.PreviousHash)
	switch {
	case w.Seq == 1 && w.PreviousHash == "":
		return sum{}
	case !ok:
		v.find(KindMissing, "the file begins with record %d, which is not the first of a file: those before it are missing", w.Seq)
		if v.started && w.Seq == v.last+1 {
			return v.previous
		}
		return w.hash
	case !v.started:
		v.note(KindMissing, "the log begins with record %d here: older files were not given", w.Seq)
	case w.Seq != v.last+1:
		v.find(KindMissing, "%s missing before this file", span(v.last+1, w.Seq-1))
	case named != v.previous:
		v.find(KindAltered, "the file does not follow the one before: it names another hash than that of record %d", v.last)
	}
	return named
}

// match searches for the expected hash.
func (v *verifier) match(w *parsedRecord) {
	switch {
	case v.since != nil:
		*v.since++
	case v.expected != nil && *v.expected == w.hash:
		v.since = new(int)
	}
}

func span(from, to uint64) string {
	if from == to {
		return fmt.Sprintf("record %d is", from)
	}
	return fmt.Sprintf("records %d to %d are", from, to)
}
