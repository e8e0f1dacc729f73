package stored

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/drill"
)

// drillReport is the result of drill.
type drillReport struct {
	OK       bool          `json:"ok"` // every value that was tried is readable
	Snapshot drillSnapshot `json:"snapshot"`
	Etcd     string        `json:"etcd"`    // version
	Etcdutl  string        `json:"etcdutl"` // version
	Lost     []string      `json:"lost"`    // the providers that were treated as lost
	Left     []drillKey    `json:"left"`    // the others
	Sample   int           `json:"sample"`  // of each KMS key of a rule; 0: all values
	drill.Count
	Rules   []drill.Rule `json:"rules"`
	Seconds drillSeconds `json:"seconds"`
	// Unreadable are the values that were not decrypted, with --list.
	Unreadable []statusKey `json:"keys"`

	tested []auditlog.Record // offline keys that unwrapped copies
}

type drillSnapshot struct {
	File  string `json:"file,omitempty"` // "": it was taken from etcd
	Bytes int64  `json:"bytes"`
	// when the file was written
	Modified time.Time `json:"modified,omitzero"`
	Revision int64     `json:"revision"` // of etcd
}

// drillKey is a provider that was not treated as lost.
type drillKey struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	KeyID  string `json:"keyID,omitempty"`
	Reason string `json:"reason,omitempty"` // why it is not OK
	// Opened says that it unwrapped recovery copies.
	Opened bool `json:"opened"`
}

// drillSeconds is how long the steps took.
type drillSeconds struct {
	Snapshot float64 `json:"snapshot"` // to take it from etcd
	Restore  float64 `json:"restore"`
	Start    float64 `json:"start"` // of etcd
	Decrypt  float64 `json:"decrypt"`
	Total    float64 `json:"total"`
}

// addKeys adds the providers that are left.
func (r *drillReport) addKeys(cl *cluster) {
	opened := make(map[string]bool)
	for _, ring := range cl.keys.Rings() {
		for _, s := range ring.Recovery() {
			opened[s.Provider] = opened[s.Provider] || !s.Used.IsZero()
		}
	}
	r.Left = []drillKey{}
	for _, ring := range cl.keys.Rings() {
		if s := ring.State(); !slices.Contains(r.Lost, s.Provider) {
			r.Left = append(r.Left, drillKey{Name: s.Provider, OK: s.Healthy, KeyID: s.KeyID, Reason: s.Reason, Opened: opened[s.Provider]})
		}
	}
	for _, ring := range cl.keys.Offline() {
		if slices.Contains(r.Lost, ring.Provider()) {
			continue
		}
		k := drillKey{Name: ring.Provider(), OK: len(cl.identities) > 0, KeyID: ring.State().KeyID, Opened: opened[ring.Provider()]}
		if !k.OK {
			k.Reason = "no --identity was given"
		}
		if k.Opened {
			r.tested = append(r.tested, auditlog.Record{Provider: k.Name, KeyID: k.KeyID, Outcome: "ok", Reason: "it unwrapped recovery copies"})
		}
		r.Left = append(r.Left, k)
	}
}

// missesCopiesOf reports whether values are missing although some like them have copies by a
// provider.
func (r *drillReport) missesCopiesOf(provider string) bool {
	for _, rule := range r.Rules {
		for _, g := range rule.Groups {
			if g.Missing > 0 && g.Copies[provider] > 0 {
				return true
			}
		}
	}
	return false
}

// conclude sums up the rules. The error says why the drill shows nothing, or not enough.
func (r *drillReport) conclude() error {
	for _, rule := range r.Rules {
		r.Add(rule.Count)
	}
	r.OK = r.Missing == 0 && r.Unavailable == 0 && r.Values > 0
	switch {
	case r.Missing > 0: // the report says so
	case r.Unavailable > 0:
		return problem.New("check the providers that are left: kms check tests them", "%d values were not decrypted, since a KMS that is left does not respond", r.Unavailable)
	case r.Values == 0:
		return problem.New("compare the prefixes of the rules with the keys in the snapshot", "the snapshot has no value under a rule, so that the drill shows nothing")
	}
	return nil
}

// isDenied reports whether etcd refuses a call for a missing or wrong user.
func isDenied(err error) bool {
	switch text := fmt.Sprint(err); status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
		return true
	default:
		return err != nil && (strings.Contains(text, "etcdserver: user name is empty") || strings.Contains(text, "etcdserver: authentication failed") ||
			strings.Contains(text, "etcdserver: permission denied") || strings.Contains(text, "etcdserver: invalid auth token"))
	}
}

// text prints the report for people.
func (r *drillReport) text(w io.Writer) {
	textKeys(w, r.Unreadable)
	from := "taken from etcd"
	if r.Snapshot.File != "" {
		from = fmt.Sprintf("%s, written %s", printable.Name(r.Snapshot.File), r.Snapshot.Modified.Format(time.RFC3339))
	}
	printable.Fprintf(w, "snapshot: %s, %s, revision %d\n", from, size(r.Snapshot.Bytes), r.Snapshot.Revision)
	printable.Fprintf(w, "treated as lost: %s\n\n", strings.Join(r.Lost, ", "))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	printable.Fprintf(t, "RULE\tENCRYPTED BY\tKEY ID\tCOPIES BY\tVALUES\tREADABLE\tMISSING\tUNAVAILABLE\tNOT TRIED\n")
	for _, rule := range r.Rules {
		for _, g := range rule.Groups {
			var copies []string
			for _, name := range slices.Sorted(maps.Keys(g.Copies)) {
				by := printable.Name(name)
				if n := g.Copies[name]; n < g.Values {
					by = fmt.Sprintf("%s (%d)", by, n)
				}
				copies = append(copies, by)
			}
			printable.Fprintf(t, "%q\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\n", rule.Prefix, printable.NameOrNone(g.Provider), printable.NameOrNone(g.KeyID),
				cmp.Or(strings.Join(copies, ", "), "none"), g.Values, g.Readable, g.Missing, g.Unavailable, g.Untried)
		}
		if len(rule.Groups) == 0 {
			printable.Fprintf(t, "%q\tnone\tnone\tnone\t0\t0\t0\t0\t0\n", rule.Prefix)
		}
	}
	_ = t.Flush() // writing to a buffer does not fail
	for _, rule := range r.Rules {
		for _, g := range rule.Groups {
			for _, why := range g.Reasons {
				printable.Fprintf(w, "\n%s under %q, for example %s: %s\n", printable.Count(why.Values, "value", "values"), rule.Prefix, printable.Name(why.Example), why.Text)
			}
		}
	}
	printable.Fprintf(w, "\n")
	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if len(r.Left) > 0 {
		printable.Fprintf(t, "LEFT\tSTATE\tKEY ID\n")
	} else {
		printable.Fprintf(t, "no provider is left\n")
	}
	for _, k := range r.Left {
		state := "not needed"
		switch {
		case !k.OK:
			state = "cannot be used"
		case k.Opened:
			state = "unwrapped recovery copies"
		case r.missesCopiesOf(k.Name):
			state = "unwrapped no recovery copy"
		}
		printable.Fprintf(t, "%s\t%s\t%s\n", printable.Name(k.Name), state, printable.NameOrNone(k.KeyID))
	}
	_ = t.Flush()
	for _, k := range r.Left { // too long for the table
		if !k.OK {
			printable.Fprintf(w, "%s: %s\n", printable.Name(k.Name), k.Reason)
		}
	}
	s := r.Seconds
	printable.Fprintf(w, "\nseconds: snapshot %.1f, restore %.1f, start %.1f, decrypt %.1f, total %.1f; etcdutl %s, etcd %s\n", s.Snapshot, s.Restore, s.Start, s.Decrypt, s.Total,
		printable.NameOrNone(r.Etcdutl), printable.NameOrNone(r.Etcd))
	tried := r.Values - r.Untried
	switch {
	case r.OK && r.Untried > 0:
		printable.Fprintf(w, "passed: each of %s tried is readable, of %d\n", printable.Count(tried, "value that was", "values that were"), r.Values)
	case r.OK:
		printable.Fprintf(w, "passed: each of %s is readable\n", printable.Count(tried, "value", "values"))
	case r.Values == 0:
		printable.Fprintf(w, "FAILED: there is no value under a rule\n")
	default:
		printable.Fprintf(w, "FAILED: of %s tried, %d are readable, %d would be missing, and %d are unavailable\n", printable.Count(tried, "value that was", "values that were"), r.Readable, r.Missing, r.Unavailable)
	}
}
