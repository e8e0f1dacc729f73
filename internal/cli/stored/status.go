package stored

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/guard"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// NewStatus returns the command status.
func NewStatus() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "show which values in etcd are encrypted, and with which keys",
		Long: `status reads every value under the rules from etcd directly. For each rule, it
counts the values that are encrypted with the current key of the rule, those that are encrypted with
another key, and those that are plaintext or undecryptable. It also shows which proxies serve this
etcd, and whether they have the rules of this configuration. It changes nothing.

reencrypt rewrites values that are stale or plaintext. Plaintext under a rule with
allowPlaintextReads: false is an exception: it was written to etcd directly, reads of it are
refused, and reencrypt skips it. Find out who wrote it.`,
		Args: command.NoArgs,
	}
	path, out := command.ConfigFlag(cmd), command.OutputFlag(cmd)
	list := cmd.Flags().Bool("list", false, "list the keys that are not current, and why")
	wait, identities := timeoutFlag(cmd), identityFlag(cmd)
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		cl, err := loadCluster(cmd, *path, clusterOptions{inspectOnly: true, identities: *identities, wait: *wait})
		if err != nil {
			return err
		}
		defer cl.close()
		report, err := cl.status(cmd, *list)
		if err != nil {
			return err
		}
		return out.Report(cmd, report.OK, report, report.text)
	})
	return cmd
}

// statusReport is the result of status. Scripts read the fields of rules other than the detail.
type statusReport struct {
	OK bool `json:"ok"`
	// that were read: one, unless etcd was compacted meanwhile
	Revisions inventory.Span `json:"revisions"`
	Rules     []statusRule   `json:"rules"`
	KMS       []statusKMS    `json:"kms"`
	Proxies   []statusProxy  `json:"proxies"`        // that announced themselves in etcd
	Agreeing  bool           `json:"agreeing"`       // whether all have the same rules and audit
	Keys      []statusKey    `json:"keys,omitempty"` // with --list, those that are not current
}

type statusRule struct {
	Prefix        string `json:"prefix"`
	WriteWith     string `json:"writeWith"`
	Strict        bool   `json:"strict"` // allowPlaintextReads: false
	Keys          int64  `json:"keys"`
	Current       int64  `json:"current"`
	Stale         int64  `json:"stale"`
	Plaintext     int64  `json:"plaintext"`
	Foreign       int64  `json:"foreign"`
	Undecryptable int64  `json:"undecryptable"`
	// unknown, because their KMS did not unwrap their DEK seeds
	Unavailable int64 `json:"unavailable"`
	// of these: the KMS responded, and refused the DEK seeds
	Refused int64               `json:"refused"`
	Detail  inventory.RuleCount `json:"detail"`
}

type statusKMS struct {
	Name    string `json:"name"`
	OK      bool   `json:"ok"`
	Revoked bool   `json:"revoked"`
	KeyID   string `json:"keyID,omitempty"`
	Reason  string `json:"reason,omitempty"`
	// of kind age: it cannot be polled, and KeyID identifies the recipients
	Offline bool `json:"offline,omitempty"`
	// of kind age: when the audit log last recorded that an identity unwrapped a recovery copy
	LastTested time.Time `json:"lastTested,omitzero"`
}

type statusProxy struct {
	coordination.Member
	SameRules bool `json:"sameRules"` // as this configuration
}

type statusKey struct {
	Key      string             `json:"key"`
	KeyBytes []byte             `json:"keyBytes,omitempty"` // Key where that is not valid UTF-8
	State    keyring.ValueState `json:"state"`
	Revision int64              `json:"revision"`
	Why      string             `json:"why,omitempty"`
}

// newStatusKey returns the entry of a value. It retains nothing of kv.
func newStatusKey(kv *mvccpb.KeyValue, state keyring.ValueState, why string) statusKey {
	key := string(kv.Key)
	return statusKey{Key: key, KeyBytes: inventory.KeyBytes(key), State: state, Revision: kv.ModRevision, Why: strings.Clone(why)}
}

// status makes the report.
func (cl *cluster) status(cmd *cobra.Command, list bool) (*statusReport, error) {
	report := &statusReport{OK: true, Agreeing: true, Rules: []statusRule{}, KMS: []statusKMS{}, Proxies: []statusProxy{}}
	refused := make(map[string]int64)
	visit := func(rule *inventory.Rule, kv *mvccpb.KeyValue, state keyring.ValueState, err error) error {
		e, ok := errors.AsType[*keyring.Error](err)
		if ok && state == inventory.Unavailable && e.Responded() {
			refused[rule.Prefix]++
		}
		if !list || state == keyring.Current {
			return nil
		}
		why := ""
		if ok && state == inventory.Unavailable {
			why = e.OfSeed() // may be about another value with the same DEK seed
		} else if err != nil {
			why = err.Error()
		}
		report.Keys = append(report.Keys, newStatusKey(kv, state, why))
		return nil
	}
	counts, span, err := inventory.Survey(cmd.Context(), cl.etcd, cl.rules, visit)
	if err != nil {
		return nil, err
	}
	report.Revisions = span
	strict := make(map[string]bool)
	for _, rule := range cl.rules.All() {
		strict[rule.Prefix] = rule.Strict
	}
	for _, c := range counts {
		n := func(s keyring.ValueState) int64 { return c.States[s].Keys }
		report.Rules = append(report.Rules, statusRule{
			Prefix: c.Prefix, WriteWith: c.WriteWith, Strict: strict[c.Prefix], Keys: c.All.Keys, Current: n(keyring.Current), Stale: n(keyring.Stale), Plaintext: n(keyring.Unencrypted),
			Foreign: n(keyring.Foreign), Undecryptable: n(keyring.Undecryptable), Unavailable: n(inventory.Unavailable), Refused: refused[c.Prefix], Detail: c,
		})
		report.OK = report.OK && c.Done()
	}
	if cl.config.Coordination.Enabled {
		members, err := cl.fleet().Members(cmd.Context())
		if err != nil {
			return nil, err
		}
		rules := coordination.PolicyDigest(guard.PolicyOf(cl.config.Rules, nil).Rules)
		for _, m := range members {
			p := statusProxy{m, m.Policy == rules}
			report.Proxies = append(report.Proxies, p)
			report.Agreeing = report.Agreeing && m.Record == members[0].Record
			report.OK = report.OK && p.SameRules && report.Agreeing
		}
	}
	for _, r := range cl.keys.Rings() {
		s := r.State()
		report.KMS = append(report.KMS, statusKMS{Name: s.Provider, OK: s.Healthy, Revoked: s.Revoked, KeyID: s.KeyID, Reason: s.Reason})
		report.OK = report.OK && s.Healthy
	}
	for _, r := range cl.keys.Offline() {
		id := r.State().KeyID
		report.KMS = append(report.KMS, statusKMS{
			Name: r.Provider(), OK: true, KeyID: id, Offline: true, LastTested: command.LastTest(cl.config, cmd.ErrOrStderr(), r.Provider(), id),
		})
	}
	return report, nil
}

// text prints the report as tables.
func (r *statusReport) text(w io.Writer) {
	textKeys(w, r.Keys)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	printable.Fprintf(t, "RULE\tWRITES WITH\tKEYS\tCURRENT\tSTALE\tPLAINTEXT\tFOREIGN\tUNDECRYPTABLE\tUNAVAILABLE\tSIZE\n")
	for _, c := range r.Rules {
		printable.Fprintf(t, "%q\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%s\n",
			c.Prefix, printable.Name(c.WriteWith), c.Keys, c.Current, c.Stale, c.Plaintext, c.Foreign, c.Undecryptable, c.Unavailable, size(c.Detail.All.Bytes))
	}
	_ = t.Flush() // writing to a buffer does not fail
	printable.Fprintf(w, "\n")
	printable.Fprintf(t, "RULE\tSTATE\tENCRYPTED BY\tKEY ID\tKEYS\tSIZE\tREVISIONS\n")
	some := false
	for _, c := range r.Rules {
		for _, k := range c.Detail.Keys {
			some = true
			by := k.Provider
			if by == inventory.Plaintext {
				by = ""
			}
			printable.Fprintf(t, "%q\t%s\t%s\t%s\t%d\t%s\t%d to %d\n", c.Prefix, k.State, printable.NameOrNone(by), printable.NameOrNone(k.KeyID), k.Keys, size(k.Bytes), k.Oldest, k.Newest)
		}
	}
	if some {
		_ = t.Flush()
		printable.Fprintf(w, "\n")
	}
	for _, c := range r.Rules {
		if injected := c.injected(); injected != "" {
			printable.Fprintf(w, "%s\n\n", injected)
		}
		if c.Refused > 0 {
			printable.Fprintf(w, "under %q, %s unavailable although the KMS responds: it does not unwrap the DEK seeds. If the KMS is healthy otherwise, the values are damaged or "+
				"encrypted under a key that it does not have; status --list names them\n\n", c.Prefix, printable.Count(c.Refused, "value is", "values are"))
		}
	}
	t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	printable.Fprintf(t, "KMS\tSTATE\tCURRENT KEY ID\n")
	for _, k := range r.KMS {
		state := "ok"
		switch {
		case k.Offline && !k.LastTested.IsZero():
			state = "offline, last tested with an identity at " + k.LastTested.Format(time.RFC3339)
		case k.Offline:
			state = "offline, not polled: kms check --identity tests it"
		case k.Revoked:
			state = "key may not be used"
		case !k.OK:
			state = "does not respond"
		}
		printable.Fprintf(t, "%s\t%s\t%s\n", printable.Name(k.Name), state, printable.NameOrNone(k.KeyID))
	}
	_ = t.Flush()
	for _, k := range r.KMS { // too long for the table
		if !k.Offline && (k.Revoked || !k.OK) {
			printable.Fprintf(w, "%s: %s\n", printable.Name(k.Name), k.Reason)
		}
	}
	if len(r.Proxies) > 0 {
		printable.Fprintf(w, "\n")
		t = tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		printable.Fprintf(t, "PROXY\tVERSION\tSTARTED\tRULES\n")
		for _, p := range r.Proxies {
			rules := "as here"
			if !p.SameRules {
				rules = "NOT as in this configuration"
			}
			printable.Fprintf(t, "%s\t%s\t%s\t%s\n", printable.Name(p.ID), printable.Name(p.Version), p.Started.Format(time.RFC3339), rules)
		}
		_ = t.Flush()
		if !r.Agreeing {
			printable.Fprintf(w, "\nthe proxies have different rules or audit settings: until they agree, the record of the rules does not change\n")
		}
	}
	if r.Revisions.First != r.Revisions.Last {
		printable.Fprintf(w, "\netcd was compacted meanwhile: values were counted at revisions %d to %d\n", r.Revisions.First, r.Revisions.Last)
	}
}

// injected returns advice about values that the rule refuses to read, and "" if there are none.
func (r *statusRule) injected() string {
	if !r.Strict || r.Plaintext+r.Foreign == 0 {
		return ""
	}
	return fmt.Sprintf("%s under %q, and %s of providers that the rule does not read: these were written to etcd directly, reads of them are refused "+
		"(allowPlaintextReads: false), and reencrypt skips them. Find out who wrote them, then delete them or write them again through a proxy",
		printable.Count(r.Plaintext, "plaintext value", "plaintext values"), r.Prefix, printable.Count(r.Foreign, "value", "values"))
}

// beforePurge is the hint for a rule with values that are not current.
func (r *statusRule) beforePurge() string {
	if injected := r.injected(); injected != "" {
		return injected + "; status --list names them"
	}
	return "run status to see which, and reencrypt them"
}

// textKeys prints a list of keys for people.
func textKeys(w io.Writer, keys []statusKey) {
	for _, k := range keys {
		why := ""
		if k.Why != "" {
			why = ": " + strings.TrimSpace(k.Why)
		}
		printable.Fprintf(w, "%s\t%s%s\n", k.State, printable.Name(k.Key), why)
	}
	if len(keys) > 0 {
		printable.Fprintf(w, "\n")
	}
}

// size prints bytes for people.
func size(n int64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/unit, 0
	for ; f >= unit && i < 3; i++ {
		f /= unit
	}
	return fmt.Sprintf("%.1f %s", f, [...]string{"KiB", "MiB", "GiB", "TiB"}[i])
}
