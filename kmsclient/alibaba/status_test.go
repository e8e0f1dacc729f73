package alibaba

import (
	"net/http"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestDescribe(t *testing.T) {
	expires := time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)
	d := kmsdouble.New(t, kmsdouble.Config{Keys: []kmsdouble.KeyConfig{{ID: kmsdouble.DefaultKeyID, MaterialExpires: expires}}})
	info, err := newBackend(t, d, nil).Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.RequestID == "" {
		t.Error("no request ID")
	}
	info.RequestID = ""
	want := &kmsclient.KeyInfo{
		KeyID: d.PrimaryKeyID(kmsdouble.DefaultKeyID), State: "Enabled", Usable: true, Spec: "Aliyun_AES_256", ProtectionLevel: "SOFTWARE",
		Creator: "154035569884****", AutomaticRotation: "Disabled", MaterialExpiresAt: expires, DeletionProtection: kmsclient.On,
	}
	if diff := cmp.Diff(want, info); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestDedicatedInstanceWithoutDescribeKey(t *testing.T) {
	d := kmsdouble.New(t, kmsdouble.Config{Dedicated: true})
	b := newBackend(t, d, nil)
	if status, err := b.Status(t.Context()); err != nil || status.KeyID != d.PrimaryKeyID(kmsdouble.DefaultKeyID) {
		t.Errorf("status = %+v, %v", status, err)
	}
	d.Rotate(kmsdouble.DefaultKeyID)
	if status, err := b.Status(t.Context()); err != nil || status.KeyID != d.PrimaryKeyID(kmsdouble.DefaultKeyID) {
		t.Errorf("status after rotation = %+v, %v", status, err)
	}
	d.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
	_, err := b.Status(t.Context())
	if e := asError(t, err); e.Class() != kmsclient.ClassKeyUnusable || e.Op != "Status" {
		t.Errorf("%+v", e)
	}
}

// TestDescribeKeyIsThrottled: the version is learned as on a dedicated instance, and so is it that
// the key may not be used.
func TestDescribeKeyIsThrottled(t *testing.T) {
	d, b := newPair(t)
	only := func(faults map[string]kmsdouble.FaultSpec) {
		d.SetFault(func(r *http.Request) *kmsdouble.FaultSpec {
			if f, ok := faults[r.URL.Query().Get("Action")]; ok {
				return &f
			}
			return nil
		})
	}
	for _, throttle := range []kmsdouble.FaultSpec{{Kind: kmsdouble.Throttle}, {Kind: kmsdouble.Throttle, Status: 400, Code: "Throttling.User"}} {
		only(map[string]kmsdouble.FaultSpec{"DescribeKey": throttle})
		d.Rotate(kmsdouble.DefaultKeyID)
		if status, err := b.Status(t.Context()); err != nil || status.KeyID != d.PrimaryKeyID(kmsdouble.DefaultKeyID) {
			t.Errorf("status = %+v, %v", status, err)
		}
		d.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
		_, err := b.Status(t.Context())
		if e := asError(t, err); e.Class() != kmsclient.ClassKeyUnusable || e.Op != "Status" {
			t.Errorf("%+v", e)
		}
		d.SetState(kmsdouble.DefaultKeyID, kmsdouble.Enabled)
		// Who may only read is not denied anything that reading needs.
		only(map[string]kmsdouble.FaultSpec{"DescribeKey": throttle, "GenerateDataKey": {Kind: kmsdouble.ErrorCode, Status: 403, Code: "Forbidden.NoPermission"}})
		_, err = b.Status(t.Context())
		if e := asError(t, err); e.Class() != kmsclient.ClassUnavailable || e.Op != "Status" {
			t.Errorf("%+v", e)
		}
	}
	only(map[string]kmsdouble.FaultSpec{"DescribeKey": {Kind: kmsdouble.ServerError}})
	made := d.Calls("GenerateDataKey")
	if _, err := b.Status(t.Context()); err == nil || d.Calls("GenerateDataKey") != made {
		t.Errorf("a KMS that fails: %v, %d data keys", err, d.Calls("GenerateDataKey")-made)
	}
}
