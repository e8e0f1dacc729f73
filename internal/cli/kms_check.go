package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// providerReport is what kms check found of one provider.
type providerReport struct {
	Name        string      `json:"name"`
	Backend     string      `json:"backend"`
	OK          bool        `json:"ok"`
	KeyID       string      `json:"keyID,omitempty"`
	Tried       []string    `json:"tried"`                           // what the rules need of it: "generate", "encrypt", "decrypt"; as far as it came
	RoundTripMS float64     `json:"roundTripMilliseconds,omitempty"` // making a key, or wrapping one, and unwrapping it
	Findings    []string    `json:"findings"`                        // what does not work
	Warnings    []string    `json:"warnings"`                        // what will stop it from working, or leave nothing when it does
	Key         *keyDetails `json:"key,omitempty"`                   // where the KMS tells more than its key's ID
	// CredentialsExpire is when the session ends that the KMS was called with, if it is one; the proxy fetches the next one before.
	CredentialsExpire *time.Time `json:"credentialsExpire,omitempty"`
}

// keyDetails is what the report has of a [kmsclient.KeyInfo].
type keyDetails struct {
	State              string     `json:"state"`
	Spec               string     `json:"spec,omitempty"`
	ProtectionLevel    string     `json:"protectionLevel,omitempty"`
	Creator            string     `json:"creator,omitempty"` // an account, or the product whose default key this is
	AutomaticRotation  string     `json:"automaticRotation,omitempty"`
	NextRotation       *time.Time `json:"nextRotation,omitempty"`
	DeleteAt           *time.Time `json:"deleteAt,omitempty"`
	MaterialExpiresAt  *time.Time `json:"materialExpiresAt,omitempty"`
	DeletionProtection bool       `json:"deletionProtection"`
	ofService          bool
}

func newKMSCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "try every configured KMS: key state, permissions, a round trip",
		Long: `check asks every configured KMS for its key's state and tries what the rules need of it: a key that is written with makes a seed and unwraps it
again, one that is named in recovery wraps a key and unwraps it again, and of one that is only read with, the state is all that can be asked. It
touches neither etcd nor a running proxy.

It warns of a key that will be deleted or expire, that is not protected from deletion or not rotated, or for which no recovery key is configured. Warnings do not
change the exit code, so that monitoring can tell a key that works from one that does not; with --strict they do.

With --policy it checks nothing, and prints the least that the callers of all keys of Alibaba Cloud KMS need, as a RAM policy in JSON. It connects to the
KMS only where the configuration names a key by an alias.`,
		Args: cobra.NoArgs,
	}
	path, out := configFlag(cmd), outputFlag(cmd)
	timeout := cmd.Flags().Duration("timeout", 30*time.Second, "how long one KMS may take")
	strict := cmd.Flags().Bool("strict", false, "exit with 1 if there is a warning, too")
	policy := cmd.Flags().Bool("policy", false, "print the RAM policy that Alibaba Cloud KMS needs, and check nothing")
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		if *timeout <= 0 {
			return &failure{code: exitUsage, err: fmt.Errorf("--timeout %v is not more than 0s", *timeout)}
		}
		c, err := loadForEach(cmd, *path, nil)
		if err != nil {
			return err
		}
		if len(c.KMS) == 0 {
			return &failure{code: exitFailure, err: errors.New("no KMS is configured"), hint: "add one under kms"}
		}
		calls := newCallLog(c, cmd.ErrOrStderr())
		if *policy {
			return printPolicy(cmd, c.KMS, *timeout, calls.kmsCall)
		}
		reports := make([]providerReport, len(c.KMS))
		var all sync.WaitGroup
		for i, k := range c.KMS {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), *timeout)
				defer cancel()
				reports[i] = checkProvider(ctx, k, usesOf(c, k), calls.kmsCall)
			})
		}
		all.Wait()
		ok := true
		for _, r := range reports {
			ok = ok && r.OK && (!*strict || len(r.Warnings) == 0)
		}
		err = out.write(cmd.OutOrStdout(), map[string]any{"ok": ok, "kms": reports}, func(w io.Writer) {
			for _, r := range reports {
				r.text(w)
			}
		})
		if err == nil && !ok {
			return &failure{code: exitFindings}
		}
		return err
	})
	return cmd
}

// printPolicy prints the RAM policy. It is JSON whatever --output says, since RAM takes nothing else.
func printPolicy(cmd *cobra.Command, providers []config.KMS, timeout time.Duration, observe func(kmsclient.Call)) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	policy, err := ramPolicy(ctx, providers, observe)
	if err != nil {
		return err
	}
	asJSON := output("json")
	return asJSON.write(cmd.OutOrStdout(), policy, nil)
}

// checkProvider tries one KMS. All that is wrong is a finding.
func checkProvider(ctx context.Context, k config.KMS, u uses, observe func(kmsclient.Call)) providerReport {
	b, err := newBackend(k, slog.New(slog.DiscardHandler))
	r := providerReport{Name: k.Name, Backend: b.kind, Tried: []string{}, Findings: []string{}, Warnings: []string{}}
	if err != nil {
		r.Findings = append(r.Findings, err.Error())
		return r
	}
	defer b.close()
	if b.reader != nil { // its keys were read, and there is nothing to ask
		r.OK = true
		return r
	}
	return checkBackend(ctx, k.Name, b, u, observe)
}

// describeTimeout leaves time for the checks proper when a KMS does not answer.
const describeTimeout = 3 * time.Second

func checkBackend(ctx context.Context, name string, b *backend, u uses, observe func(kmsclient.Call)) (r providerReport) {
	r = providerReport{Name: name, Backend: b.kind, Tried: []string{}, Findings: []string{}, Warnings: []string{}}
	var info *kmsclient.KeyInfo
	defer func() {
		r.OK = len(r.Findings) == 0
		for _, w := range keyWarnings(info, b.lateCredentials(), u.recovered, time.Now()) {
			r.Warnings = append(r.Warnings, w.text)
		}
	}()
	if expire := b.credentialsExpire(); expire != nil {
		defer func() { r.CredentialsExpire = when(expire()) }()
	}
	client, err := kmsclient.New(kmsclient.Config{Name: name, Backend: b.service, Timeout: b.timeout, Observer: observe})
	if err != nil {
		r.found("%v", err)
		return r
	}
	if describe := b.describe(); describe != nil {
		limited, cancel := context.WithTimeout(ctx, describeTimeout)
		if info, err = observed(name, observe, describe)(limited); err == nil {
			r.Key = details(info)
		}
		cancel() // what is wrong shows in the state below; a dedicated instance describes no keys
	}
	status, err := client.Status(ctx)
	if err != nil {
		r.found("state: %v", err)
		return r
	}
	r.KeyID = status.KeyID
	if status.Healthz != "ok" {
		r.found("state: the KMS says that it is not healthy")
	}
	start, before := time.Now(), len(r.Findings)
	if u.seals {
		r.trySeed(ctx, client)
	}
	if u.copies {
		r.tryCopy(ctx, client)
	}
	if len(r.Tried) > 0 && len(r.Findings) == before {
		r.RoundTripMS = float64(time.Since(start).Microseconds()) / 1000
	}
	return r
}

// when returns t for a report, or nil if it is zero.
func when(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

func details(i *kmsclient.KeyInfo) *keyDetails {
	return &keyDetails{
		State: i.State, Spec: i.Spec, ProtectionLevel: i.ProtectionLevel, Creator: i.Creator, AutomaticRotation: i.AutomaticRotation,
		NextRotation: when(i.NextRotation), DeleteAt: when(i.DeleteAt), MaterialExpiresAt: when(i.MaterialExpiresAt),
		DeletionProtection: i.DeletionProtection == kmsclient.On, ofService: i.OfService,
	}
}

// text prints a report for people.
func (r providerReport) text(w io.Writer) {
	verdict := "ok"
	if !r.OK {
		verdict = "FAILED"
	}
	printf(w, "%s (%s): %s\n", quoted(r.Name), r.Backend, verdict)
	if r.KeyID != "" {
		printf(w, "  key ID      %s\n", quoted(r.KeyID))
	}
	if r.OK && r.KeyID != "" && len(r.Tried) == 0 {
		printf(w, "  tried       its state only: the rules read with it, and write nothing\n")
	}
	if r.RoundTripMS > 0 {
		printf(w, "  round trip  %.1f ms\n", r.RoundTripMS)
	}
	if k := r.Key; k != nil {
		protection := "off: the key can be scheduled for deletion"
		if k.DeletionProtection {
			protection = "on"
		}
		printf(w, "  key state   %s\n  rotation    %s\n  deletion protection  %s\n", k.State, orNone(k.AutomaticRotation), protection)
	}
	if r.CredentialsExpire != nil {
		printf(w, "  credentials expire   %s, and are refreshed before\n", r.CredentialsExpire.Format(time.RFC3339))
	}
	for _, f := range r.Findings {
		printf(w, "  - %s\n", f)
	}
	for _, f := range r.Warnings {
		printf(w, "  - warning: %s\n", f)
	}
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// nameOrNone is [quoted] for a name that may be missing. One that is called none is told from that
// by its quotes.
func nameOrNone(name string) string {
	switch name {
	case "":
		return "none"
	case "none":
		return strconv.Quote(name)
	}
	return quoted(name)
}
