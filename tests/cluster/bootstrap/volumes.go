package bootstrap

import (
	"context"
	"errors"
	"flag"
	"log"
	"os"
	"path/filepath"
	"time"

	core "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/util/workqueue"
)

const provisionerName = "plimsoll.dev/node-folder"

// volumes gives every claim of its provisioner's StorageClass a folder on the node. Folders, not hostPath volumes: the kubelet changes
// the group of a local volume to the pod's fsGroup, so that programs which are not root can write.
type volumes struct {
	client    kubernetes.Interface
	node      string
	folder    string
	claims    cache.SharedIndexInformer
	persisted cache.SharedIndexInformer
	queue     workqueue.TypedRateLimitingInterface[item]
}

// item is a claim (with a namespace) or a volume (without).
type item struct{ namespace, name string }

func ProvisionVolumes(arguments []string) error {
	flags := flag.NewFlagSet("volume-provisioner", flag.ExitOnError)
	kubeconfig := flags.String("kubeconfig", "", "the kubeconfig")
	node := flags.String("node", "", "name of the node that has the folder")
	folder := flags.String("folder", "", "where the volumes' folders are made")
	if err := flags.Parse(arguments); err != nil {
		return err
	}
	if *kubeconfig == "" || *node == "" || *folder == "" {
		return errors.New("--kubeconfig, --node and --folder are needed")
	}
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	v := &volumes{
		client: client, node: *node, folder: *folder,
		claims:    factory.Core().V1().PersistentVolumeClaims().Informer(),
		persisted: factory.Core().V1().PersistentVolumes().Informer(),
		queue:     workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[item](100*time.Millisecond, 10*time.Second)),
	}
	for _, informer := range []cache.SharedIndexInformer{v.claims, v.persisted} {
		enqueue := func(object any) {
			if accessor, ok := object.(meta.Object); ok {
				v.queue.Add(item{accessor.GetNamespace(), accessor.GetName()})
			}
		}
		_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: enqueue, UpdateFunc: func(_, object any) { enqueue(object) }})
		if err != nil {
			return err
		}
	}
	ctx := context.Background()
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	for {
		next, isShutDown := v.queue.Get()
		if isShutDown {
			return nil
		}
		if err := v.reconcile(ctx, next); err != nil {
			log.Printf("%s/%s: %v", next.namespace, next.name, err)
			v.queue.AddRateLimited(next)
		} else {
			v.queue.Forget(next)
		}
		v.queue.Done(next)
	}
}

func (v *volumes) reconcile(ctx context.Context, next item) error {
	if next.namespace == "" {
		if object, exists, err := v.persisted.GetStore().GetByKey(next.name); err != nil || !exists {
			return err
		} else {
			return v.release(ctx, object.(*core.PersistentVolume))
		}
	}
	object, exists, err := v.claims.GetStore().GetByKey(next.namespace + "/" + next.name)
	if err != nil || !exists {
		return err
	}
	return v.provision(ctx, object.(*core.PersistentVolumeClaim))
}

// provision makes a folder and its volume for a claim that the controller manager has handed to this provisioner.
func (v *volumes) provision(ctx context.Context, claim *core.PersistentVolumeClaim) error {
	if claim.Spec.VolumeName != "" || claim.DeletionTimestamp != nil || claim.Annotations["volume.kubernetes.io/storage-provisioner"] != provisionerName {
		return nil
	}
	name := "pvc-" + string(claim.UID)
	path := filepath.Join(v.folder, name)
	if err := os.MkdirAll(path, 0o770); err != nil {
		return err
	}
	mode := core.PersistentVolumeFilesystem
	_, err := v.client.CoreV1().PersistentVolumes().Create(ctx, &core.PersistentVolume{
		ObjectMeta: meta.ObjectMeta{Name: name, Annotations: map[string]string{"pv.kubernetes.io/provisioned-by": provisionerName}},
		Spec: core.PersistentVolumeSpec{
			AccessModes:                   claim.Spec.AccessModes,
			Capacity:                      core.ResourceList{core.ResourceStorage: claim.Spec.Resources.Requests[core.ResourceStorage]},
			ClaimRef:                      &core.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID},
			PersistentVolumeReclaimPolicy: core.PersistentVolumeReclaimDelete,
			PersistentVolumeSource:        core.PersistentVolumeSource{Local: &core.LocalVolumeSource{Path: path}},
			StorageClassName:              *claim.Spec.StorageClassName,
			VolumeMode:                    &mode,
			NodeAffinity: &core.VolumeNodeAffinity{Required: &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{{
				MatchExpressions: []core.NodeSelectorRequirement{{Key: core.LabelHostname, Operator: core.NodeSelectorOpIn, Values: []string{v.node}}},
			}}}},
		},
	}, meta.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// release removes a volume whose claim is gone, with its folder.
func (v *volumes) release(ctx context.Context, volume *core.PersistentVolume) error {
	isOurs := volume.Annotations["pv.kubernetes.io/provisioned-by"] == provisionerName
	if !isOurs || volume.Status.Phase != core.VolumeReleased || volume.Spec.PersistentVolumeReclaimPolicy != core.PersistentVolumeReclaimDelete {
		return nil
	}
	if err := os.RemoveAll(filepath.Join(v.folder, volume.Name)); err != nil {
		return err
	}
	err := v.client.CoreV1().PersistentVolumes().Delete(ctx, volume.Name, meta.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
