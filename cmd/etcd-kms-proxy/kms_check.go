package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba"
)

// providerReport is what kms check found of one provider.
type providerReport struct {
	Name        string      `json:"name"`
	Backend     string      `json:"backend"`
	OK          bool        `json:"ok"`
	KeyID       string      `json:"keyID,omitempty"`
	RoundTripMS float64     `json:"roundTripMilliseconds,omitempty"` // making a seed and unwrapping it
	Findings    []string    `json:"findings"`
	Key         *keyDetails `json:"key,omitempty"` // where the KMS tells more than its key's ID
}

// keyDetails are what Alibaba Cloud KMS tells of a key.
type keyDetails struct {
	State              string     `json:"state"`
	Spec               string     `json:"spec,omitempty"`
	ProtectionLevel    string     `json:"protectionLevel,omitempty"`
	AutomaticRotation  string     `json:"automaticRotation,omitempty"`
	NextRotation       *time.Time `json:"nextRotation,omitempty"`
	DeleteAt           *time.Time `json:"deleteAt,omitempty"`
	MaterialExpiresAt  *time.Time `json:"materialExpiresAt,omitempty"`
	DeletionProtection bool       `json:"deletionProtection"`
}

func newKMSCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "try every configured KMS: key state, permissions, a round trip",
		Long: `check asks every configured KMS for its key's state, has it make a seed and unwrap it again, and compares. It touches neither etcd nor a running
proxy. It exits with 1 if a KMS cannot do what the proxy needs, or if its key is going to stop working.`,
		Args: cobra.NoArgs,
	}
	path, out := configFlag(cmd), outputFlag(cmd)
	timeout := cmd.Flags().Duration("timeout", 30*time.Second, "how long one KMS may take")
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		if *timeout <= 0 {
			return &failure{code: exitUsage, err: fmt.Errorf("--timeout %v is not more than 0s", *timeout)}
		}
		c, err := loadConfig(cmd, *path)
		if err != nil {
			return err
		}
		if len(c.KMS) == 0 {
			return &failure{code: exitFailure, err: errors.New("no KMS is configured"), hint: "add one under kms"}
		}
		reports := make([]providerReport, len(c.KMS))
		var all sync.WaitGroup
		for i, k := range c.KMS {
			all.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), *timeout)
				defer cancel()
				reports[i] = checkProvider(ctx, k)
			})
		}
		all.Wait()
		ok := true
		for _, r := range reports {
			ok = ok && r.OK
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

// checkProvider tries one KMS. All that is wrong is a finding.
func checkProvider(ctx context.Context, k config.KMS) (r providerReport) {
	r = providerReport{Name: k.Name, Findings: []string{}}
	defer func() { r.OK = len(r.Findings) == 0 }()
	found := func(format string, args ...any) { r.Findings = append(r.Findings, fmt.Sprintf(format, args...)) }
	b, err := newBackend(k, slog.New(slog.DiscardHandler))
	r.Backend = b.kind
	if err != nil {
		found("%v", err)
		return r
	}
	defer b.close()
	client, err := kmsclient.New(kmsclient.Config{Name: k.Name, Backend: b.service, Timeout: b.timeout})
	if err != nil {
		found("%v", err)
		return r
	}
	if b.describe != nil {
		if info, err := b.describe(ctx); err == nil {
			r.Key = details(info)
			for _, f := range r.Key.findings(time.Now()) {
				found("%s", f)
			}
		}
	}
	status, err := client.Status(ctx)
	if err != nil {
		found("state: %v", err)
		return r
	}
	r.KeyID = status.KeyID
	if status.Healthz != "ok" {
		found("state: the KMS says that it is not healthy")
	}
	start := time.Now()
	key, err := client.GenerateDataKey(ctx, newUID())
	if err != nil {
		found("make a seed: %v", err)
		return r
	}
	defer clear(key.Plaintext)
	if key.KeyID != status.KeyID {
		found("the KMS made a seed under key ID %q while its state names %q", key.KeyID, status.KeyID)
	}
	plaintext, err := client.Decrypt(ctx, newUID(), &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID, Annotations: key.Annotations})
	r.RoundTripMS = float64(time.Since(start).Microseconds()) / 1000
	defer clear(plaintext)
	switch {
	case err != nil:
		found("unwrap the seed: %v", err)
	case !bytes.Equal(plaintext, key.Plaintext):
		found("unwrap the seed: the KMS answered another one than it made")
	}
	return r
}

// soon is how long before a key stops working it becomes a finding.
const soon = 30 * 24 * time.Hour

func details(i *alibaba.KeyInfo) *keyDetails {
	when := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		return &t
	}
	return &keyDetails{
		State: i.State, Spec: i.Spec, ProtectionLevel: i.ProtectionLevel, AutomaticRotation: i.AutomaticRotation,
		NextRotation: when(i.NextRotation), DeleteAt: when(i.DeleteAt), MaterialExpiresAt: when(i.MaterialExpiresAt),
		DeletionProtection: i.DeletionProtection,
	}
}

// findings says what will stop the key from working. That it does not work now shows in the round trip.
func (k *keyDetails) findings(now time.Time) []string {
	var fs []string
	if k.DeleteAt != nil {
		fs = append(fs, fmt.Sprintf("the key will be deleted at %s: every value under it is lost then", k.DeleteAt.Format(time.RFC3339)))
	}
	if k.MaterialExpiresAt != nil && k.MaterialExpiresAt.Sub(now) < soon {
		fs = append(fs, fmt.Sprintf("the key's material expires at %s", k.MaterialExpiresAt.Format(time.RFC3339)))
	}
	return fs
}

// text prints a report for people.
func (r providerReport) text(w io.Writer) {
	verdict := "ok"
	if !r.OK {
		verdict = "FAILED"
	}
	fmt.Fprintf(w, "%s (%s): %s\n", r.Name, r.Backend, verdict)
	if r.KeyID != "" {
		fmt.Fprintf(w, "  key ID      %s\n", r.KeyID)
	}
	if r.RoundTripMS > 0 {
		fmt.Fprintf(w, "  round trip  %.1f ms\n", r.RoundTripMS)
	}
	if k := r.Key; k != nil {
		protection := "off: the key can be scheduled for deletion"
		if k.DeletionProtection {
			protection = "on"
		}
		fmt.Fprintf(w, "  key state   %s\n  rotation    %s\n  deletion protection  %s\n", k.State, orNone(k.AutomaticRotation), protection)
	}
	for _, f := range r.Findings {
		fmt.Fprintf(w, "  - %s\n", f)
	}
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// newUID names a call in the KMS' log.
func newUID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return "check-" + hex.EncodeToString(b[:])
}
